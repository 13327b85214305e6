"""What `opt-zoo bench` is made of: the work, who does it, in which process, and what the machine could do at best."""
