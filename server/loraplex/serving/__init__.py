"""What the service is made of: from names and files to versions, from requests to texts. No HTTP."""
