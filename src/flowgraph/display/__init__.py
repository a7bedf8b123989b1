"""What every display shares: colours with one meaning, signs for invisible characters, notebook fragments."""
