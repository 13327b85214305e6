"""metaseq's checkpoints in every layout, read and written without metaseq, omegaconf or torch."""
