"""What MONAI Label loads by its path."""
