"""What a person or another program starts: the `dirtmap` command."""
