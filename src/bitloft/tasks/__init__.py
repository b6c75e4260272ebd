"""What a model is trained and measured on: rows of a file in, token ids and labels out, one file a family."""
