"""One server of several processes: a supervisor that starts them and adds up what they say, and their side of it."""
