"""The station beside a camera: a page to review and teach, a record of what was decided, and a watch for drift."""
