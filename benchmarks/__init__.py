"""Speed compared with a plain implementation of the published algorithm. Not part of the tests."""
