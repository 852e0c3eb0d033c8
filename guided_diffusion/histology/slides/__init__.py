"""Raw slides in and patches out: annotations as they are published, cutting, and toy slides to try things on."""
