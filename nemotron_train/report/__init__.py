"""What a person reads of runs: tables, pictures, one HTML page. No torch."""
