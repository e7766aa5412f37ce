"""Bytes by named part before anything is loaded, what fits on a card, and how long it takes."""
