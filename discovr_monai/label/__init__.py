"""MONAI Label over an archive of cines: presented without names, annotated, and back again."""
