"""python -m report RUN [RUN ...]"""

import sys

from report import main
from storage import system

if __name__ == "__main__":
    system.end_quietly_in_pipes()
    sys.exit(main(sys.argv[1:]))
