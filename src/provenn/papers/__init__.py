"""One folder a paper; whoever knows the paper's name knows the room."""
