"""Image files as a user has them: found, told from masks, read, with errors that name the file."""
