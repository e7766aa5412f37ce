"""The teacher: what a loss may know of it (`signal`), and how a batch gets to know it (`sources`)."""
