"""The text side of an adapter: chat template, tokenizer and serving profile, checked when they come and applied when
they serve. What is not the operator's own is read and rendered in confined child processes."""
