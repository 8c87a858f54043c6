"""What attention layers of image transformers do, for every host library; none is imported here."""
