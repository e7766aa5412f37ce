"""The teacher: what a loss may know of it (`signal`, `kept`), and how a batch gets to know it (`sources`, `cache`)."""
