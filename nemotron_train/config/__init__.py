"""The configuration: what was asked (`schema`) and what follows from it (`derive`)."""
