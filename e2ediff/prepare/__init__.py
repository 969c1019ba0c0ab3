"""Before training: cropping images once, looking for damaged ones, counting classes."""
