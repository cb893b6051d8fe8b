"""python -m tempering: the command line."""

from tempering.cli import main

if __name__ == "__main__":
    main()
