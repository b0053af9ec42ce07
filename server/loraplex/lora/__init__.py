"""An adapter as files and arithmetic: PEFT folders, checks, the disk store and its registry."""
