"""Hugging Face's NemotronH format: names, fields, files, both directions."""
