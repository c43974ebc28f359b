"""Diffusers pipelines, each folder byte for byte the code of a Hub model repository."""
