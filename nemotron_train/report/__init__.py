"""What a person reads of a run: tables and pictures. No torch."""
