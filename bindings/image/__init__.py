"""What attention layers of image transformers do, whatever the host: no host library is imported here."""
