"""``python -m yelp_hpc``."""

from yelp_hpc.cli import main

if __name__ == "__main__":
    main()
