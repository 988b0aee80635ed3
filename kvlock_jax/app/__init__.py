"""A local page to edit videos in: `kvlock app`.

What the page does is plain functions over arrays and files, which know nothing of the page: `clips`
reads what is uploaded and `uploads` deletes it, `marks` makes a mask of what is marked, `views`
draws it, `request` checks the fields and tells the command that does the same, `curves` and
`preview` draw a run, `edits` runs one and `jobs` runs them one at a time. `fragments` are HTML;
`handlers` and `page` put all on a page, by Gradio, with `page.css` and `page.js`.
"""
