"""From a checkpoint and studies to embeddings, EF and contours."""
