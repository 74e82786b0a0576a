"""How fast it is, beside the published algorithm written plainly. Not part of the tests."""
