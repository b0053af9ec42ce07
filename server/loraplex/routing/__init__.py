"""Names and the way from a request's `model` to what answers it. Pure: no torch, no files, no sockets."""
