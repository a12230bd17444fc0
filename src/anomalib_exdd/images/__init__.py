"""Image files: found, told apart from masks, and read, with errors that name the file."""
