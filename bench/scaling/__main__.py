"""The command of this package."""

from .run import main

if __name__ == "__main__":
    main()
