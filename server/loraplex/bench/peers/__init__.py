"""The same model, adapters and workload through other servers, in turn on one machine: `loraplex bench peers`."""
