import sys

from examples.smoke.run import main

if __name__ == "__main__":
    sys.exit(main())
