"""Raw text from files of every supported form, in chunks of rows."""
