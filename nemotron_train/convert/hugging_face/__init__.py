"""Export to and import from Hugging Face's NemotronH format: names, fields, files."""
