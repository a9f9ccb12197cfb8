"""python -m report RUN [RUN ...]"""

import signal
import sys

from report import main

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped into head
    sys.exit(main(sys.argv[1:]))
