"""Dataset columns, layouts, tokens and the folders that stages exchange."""
