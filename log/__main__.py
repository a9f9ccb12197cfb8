"""Where the report was."""

import sys

if __name__ == "__main__":
    sys.stderr.write("use: python -m report RUN\n")
    sys.exit(2)
