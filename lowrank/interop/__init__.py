"""Other libraries and file formats: read layers from them and write chains to them."""
