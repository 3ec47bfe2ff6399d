"""Tables in pages of documentation, written from committed files of results."""
