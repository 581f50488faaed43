"""`python -m dirtmap.tools`: the `dirtmap` command, for when it is not on the PATH."""

from dirtmap.tools.start import main

main()
