"""What the tests of the command share."""

from fixtures import host, tiny_recipe, tiny_text

__all__ = ["host", "tiny_recipe", "tiny_text"]
