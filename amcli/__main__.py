"""`python -m amcli`: the command line without its installed script."""

import sys

from amcli.commands.app import main

if __name__ == "__main__":
    sys.exit(main())
