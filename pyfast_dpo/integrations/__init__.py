"""Drop-ins for trainers that people already have; each module imports its library where it is used."""
