"""Cases of `verify_families.py`: each family held against numbers that nobody here made."""
