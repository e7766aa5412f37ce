"""What Sphinx does not know of this project."""
