#![allow(clippy::unwrap_used)]
use super::*;
use serde_json::json;

fn files() -> ModelFiles {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    ModelFiles { tokenizer_config: config.as_object().unwrap().clone(), ..ModelFiles::default() }
}

fn template(text: &str) -> ChatTemplate {
    let source = TemplateSource::File("test".to_owned());
    ChatTemplate::parse(source, text, files().special_tokens()).unwrap()
}

fn render_with(template: &ChatTemplate, messages: &Json, switches: &[(String, bool)]) -> Result<String, TemplateError> {
    let messages = messages.as_array().unwrap();
    template.render(&RenderInput { messages, switches, max_output_bytes: 10_000 })
}

fn render(text: &str) -> Result<String, TemplateError> {
    render_with(&template(text), &json!([{"role": "user", "content": "hi"}]), &[])
}

fn builtin(name: &str, messages: &Json) -> Result<String, TemplateError> {
    render_with(&ChatTemplate::load(&files(), Some(name)).unwrap().unwrap(), messages, &[])
}

fn conversation() -> Json {
    json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"},
           {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three?"}])
}

#[test]
fn builtin_forms() {
    let all: Vec<String> = BUILTIN_TEMPLATES
        .iter()
        .filter(|(name, _)| *name != "vicuna")
        .map(|(name, _)| format!("{name}: {}", builtin(name, &conversation()).unwrap()))
        .collect();
    insta::assert_snapshot!(all.join("\n----\n"));
}

#[test]
fn vicuna_puts_the_time_into_the_system_text() {
    let text = builtin("vicuna", &conversation()).unwrap();
    let (system, turns) = text.split_once(" USER: ").unwrap();
    let time = system.strip_prefix("<s>Be brief. It is now ").unwrap();
    let year = chrono::Local::now().format(" %Y, ").to_string();
    assert!(time.contains(&year) && time.ends_with('.'), "{system}");
    assert_eq!(turns, "One? ASSISTANT: Two.</s>USER: Three? ASSISTANT:");
    let own = builtin("vicuna", &json!([{"role": "user", "content": "One?"}])).unwrap();
    assert!(own.starts_with("<s>This is a conversation") && own.ends_with(" USER: One? ASSISTANT:"), "{own}");
}

#[test]
fn forms_that_take_turns_refuse_others() {
    let twice = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    for name in ["llama-2", "mistral"] {
        let error = builtin(name, &twice).unwrap_err();
        assert!(matches!(&error, TemplateError::Raised(m) if m.contains("take turns")), "{error:?}");
    }
}

#[test]
fn a_switch_reaches_the_template() {
    let template = ChatTemplate::load(&files(), Some("qwen")).unwrap().unwrap();
    let messages = json!([{"role": "user", "content": "hi"}]);
    let off = render_with(&template, &messages, &[("enable_thinking".to_owned(), false)]).unwrap();
    assert!(off.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "{off:?}");
}

#[test]
fn blocks_are_trimmed_as_transformers_does() {
    assert_eq!(
        render("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n").unwrap(),
        "hi\n"
    );
}

#[test]
fn python_habits_work() {
    let text = "{{ messages[0]['content'].upper() }} {{ messages|length }} {{ messages[0].get('x', 'none') }} \
                {{ messages[0] | tojson }} {% if tools is not none %}tools{% endif %}";
    assert_eq!(render(text).unwrap(), r#"HI 1 none {"content": "hi", "role": "user"} "#);
}

#[test]
fn generation_tags_are_left_out() {
    assert_eq!(render("a{%- generation %}b{{ 1 }}{% endgeneration -%} c").unwrap(), "ab1c");
}

#[test]
fn limits_end_hostile_templates() {
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(loops), Err(TemplateError::Failed(_))));
    let long = "{% for a in range(9999) %}0123456789{% endfor %}";
    assert_eq!(render(long), Err(TemplateError::OutputTooLong { limit_bytes: 10_000 }));
    let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(matches!(render(recursion), Err(TemplateError::Failed(_))));
    assert!(matches!(render("{{ strftime_now('%Q!') }}"), Err(TemplateError::Failed(_))));
    assert!(matches!(render("{% include '/etc/passwd' %}"), Err(TemplateError::Failed(_))));
}

#[test]
fn the_choice_goes_before_the_models_own() {
    let mut files = files();
    assert!(ChatTemplate::load(&files, None).unwrap().is_none());
    files.tokenizer_config.insert(
        "chat_template".to_owned(),
        json!([{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]),
    );
    let text = |files: &ModelFiles, choice| {
        render_with(&ChatTemplate::load(files, choice).unwrap().unwrap(), &json!([]), &[]).unwrap()
    };
    assert_eq!(text(&files, None), "d");
    assert_eq!(text(&files, Some("rag")), "r");
    files.chat_template = Some("file".to_owned());
    assert_eq!(text(&files, None), "file");
    let error = ChatTemplate::load(&files, Some("nonesuch")).unwrap_err().to_string();
    assert!(error.contains("nonesuch") && error.contains("chatml, gemma"), "{error}");
}

#[test]
fn a_broken_template_is_an_error_at_load() {
    let mut files = files();
    files.tokenizer_config.insert("chat_template".to_owned(), json!("{% if %}"));
    let error = ChatTemplate::load(&files, None).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("chat_template"), "{error}");
}
