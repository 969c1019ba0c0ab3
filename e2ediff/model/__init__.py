"""A recipe's networks, built or trained, and what they are asked for."""
