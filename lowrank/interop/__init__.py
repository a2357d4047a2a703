"""Networks of other libraries and formats: layers out of them, chains into them."""
