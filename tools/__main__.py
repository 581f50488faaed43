"""`python -m dirtmap.tools`: the `dirtmap` command, where it is not on the path."""

from dirtmap.tools.start import main

main()
