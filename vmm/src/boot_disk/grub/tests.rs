use super::*;

const UUID: &str = "11111111-2222-4333-8444-555555555555";

/// One disk with a root file system as partition 1 and a boot partition 2.
#[derive(Default)]
struct Disk {
    /// The contents of `grubenv`.
    block: String,
    /// The contents of `custom.cfg`.
    custom: String,
}

impl Volumes for Disk {
    fn by_name(&self, name: &str) -> Option<usize> {
        ["hd0,gpt1", "hd0,gpt2"].iter().position(|known| *known == name)
    }

    fn name(&self, volume: usize) -> String {
        format!("hd0,gpt{}", volume + 1)
    }

    fn by_uuid(&self, uuid: &str) -> Option<usize> {
        ["another", UUID].iter().position(|known| *known == uuid)
    }

    fn by_label(&self, label: &str) -> Option<usize> {
        ["root", "boot"].iter().position(|known| *known == label)
    }

    fn by_file(&self, path: &str) -> Option<usize> {
        ["/on-1", "/on-2"].iter().position(|known| *known == path)
    }

    fn read(&self, volume: usize, path: &str) -> Option<Vec<u8>> {
        match (volume, path) {
            (0, "/boot/grub/grubenv") => Some(self.block.clone().into_bytes()),
            (0, "/boot/grub/custom.cfg") => Some(self.custom.clone().into_bytes()),
            _ => None,
        }
    }

    fn list(&self, _: usize, _: &str) -> Vec<String> {
        Vec::new()
    }

    fn look(&self, volume: usize, path: &str) -> Option<Option<u64>> {
        match (volume, path) {
            (0, "/boot") => Some(None),
            _ => self.read(volume, path).map(|text| Some(text.len() as u64)),
        }
    }
}

fn choose_on(disk: &Disk, text: &str) -> Result<Chosen, GrubError> {
    Ok(choose(disk, 0, "/boot/grub/grub.cfg", text)?.entries.swap_remove(0))
}

fn chosen(text: &str) -> Chosen {
    choose_on(&Disk::default(), text).unwrap()
}

fn refused(text: &str) -> String {
    choose_on(&Disk::default(), text).unwrap_err().to_string()
}

/// A menu in the manner of `update-grub`, with `head` in front.
fn menu(head: &str) -> String {
    let entry = |title: &str, id: &str, version: &str| {
        format!(
            "menuentry '{title}' --class os $menuentry_id_option '{id}' {{\n\
             \tvideo\n\tif [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi\n\
             \tset root='hd0,gpt9'\n\
             \tif [ x$feature_platform_search_hint = xy ]; then\n\
             \t  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt9  {UUID}\n\
             \telse\n\t  search --no-floppy --fs-uuid --set=root {UUID}\n\tfi\n\
             \techo\t'Loading ...'\n\
             \tlinux\t/boot/vmlinuz-{version} root=UUID={UUID} ro  quiet\n\
             \tinitrd\t/boot/initrd-{version}\n}}\n"
        )
    };
    let newest = entry("Debian", "debian-simple", "6.2");
    let (a, b) =
        (entry("Debian 6.2", "debian-6.2", "6.2"), entry("Debian 6.1", "debian-6.1", "6.1"));
    format!(
        "# a comment; with 'quotes\n\
         if [ -s $prefix/grubenv ]; then\n  load_env\nfi\n\
         {head}\n\
         if [ x\"${{feature_menuentry_id}}\" = xy ]; then\n  menuentry_id_option=\"--id\"\nelse\n  \
         menuentry_id_option=\"\"\nfi\n\
         function video {{\n  if [ x$feature_all_video_module = xy ]; then\n    insmod all_video\n  fi\n}}\n\
         if loadfont $font ; then\n  terminal_output gfxterm\nfi\n\
         {newest}submenu 'More' $menuentry_id_option 'debian-more' {{\n{a}{b}}}\n\
         if [ -f $prefix/custom.cfg ]; then\n  source $prefix/custom.cfg\nfi\n"
    )
}

#[test]
fn the_first_entry_is_booted_from_the_file_system_that_its_uuid_names() {
    let chosen = chosen(&menu("set default=\"0\""));
    assert_eq!(chosen.title, "Debian");
    assert_eq!(chosen.kernel, Place { volume: 1, path: "/boot/vmlinuz-6.2".to_owned() });
    assert_eq!(chosen.initramfs, [Place { volume: 1, path: "/boot/initrd-6.2".to_owned() }]);
    assert_eq!(chosen.cmdline, format!("BOOT_IMAGE=/boot/vmlinuz-6.2 root=UUID={UUID} ro quiet"));
}

#[test]
fn the_default_is_a_number_a_title_or_an_identifier_at_each_level() {
    let title = |default: &str| chosen(&menu(&format!("set default='{default}'"))).title;
    assert_eq!(title("debian-simple"), "Debian");
    assert_eq!(title("1>1"), "Debian 6.1");
    assert_eq!(title("More>Debian 6.1"), "Debian 6.1");
    assert_eq!(title("debian-more>debian-6.1"), "Debian 6.1");
    assert_eq!(title("1>0"), "Debian 6.2");
    assert_eq!(title("debian-more"), "Debian 6.2");
    assert_eq!(title("there is no such entry"), "Debian");
    assert_eq!(title("7"), "Debian");
}

#[test]
fn behind_the_default_are_its_fallbacks_and_the_other_entries_of_all_menus() {
    let disk = Disk::default();
    let titles = |head: &str| -> Vec<String> {
        let text = menu(head) + "menuentry windows { chainloader +1 }";
        let all = choose(&disk, 0, "/boot/grub/grub.cfg", &text).unwrap().entries;
        assert!(all.iter().all(|chosen| chosen.saves.is_empty() && !chosen.is_once));
        all.into_iter().map(|chosen| chosen.title).collect()
    };
    assert_eq!(titles("set default=0"), ["Debian", "Debian", "Debian 6.2", "Debian 6.1"]);
    let named = ["Debian 6.1", "Debian 6.2", "Debian", "Debian 6.2", "Debian 6.1"];
    assert_eq!(titles("set default='1>1'\nset fallback='1>0 2'"), named);
}

#[test]
fn an_entry_in_place_of_another_saves_what_the_script_saves_and_not_itself() {
    let text = menu(SAVED).replace("\tvideo\n", "\tsavedefault\n");
    let all = |block| choose(&with_block(block), 0, "/boot/grub/grub.cfg", &text).unwrap().entries;
    let all_saves = |block| -> Vec<usize> { all(block).iter().map(|c| c.saves.len()).collect() };
    assert_eq!(all_saves(block("a=1\n")), [1, 0, 0, 0]);
    let once = all(block("next_entry=1>0\n"));
    assert!(once.iter().all(|chosen| lines(chosen) == "next_entry=\n"), "{once:?}");
}

#[test]
fn a_configuration_that_was_cut_off_has_the_entries_in_front_of_the_cut() {
    let text = menu("");
    let cut = &text[..text.find("'Debian 6.1'").unwrap()];
    assert!(refused(cut).contains("it cannot be parsed"));
    let longest = beginnings(cut).find_map(|text| choose_on(&Disk::default(), text).ok());
    assert_eq!(longest.unwrap().title, "Debian");
    assert_eq!(beginnings("menuentry a {\nlinux /a\n").next(), None);
}

/// What `grub-mkconfig` writes into the head of a configuration, with `GRUB_DEFAULT=saved` and
/// `GRUB_SAVEDEFAULT=true`.
const SAVED: &str = "if [ \"${next_entry}\" ] ; then\n set default=\"${next_entry}\"\n set next_entry=\n \
    save_env next_entry\n set boot_once=true\nelse\n set default=\"${saved_entry}\"\nfi\n\
    if [ \"${prev_saved_entry}\" ]; then\n set saved_entry=\"${prev_saved_entry}\"\n save_env saved_entry\n \
    set prev_saved_entry=\n save_env prev_saved_entry\n set boot_once=true\nfi\n\
    function savedefault {\n if [ -z \"${boot_once}\" ]; then\n saved_entry=\"${chosen}\"\n \
    save_env saved_entry\n fi\n}\n";

/// An environment block as `grub-editenv` makes it, with these lines.
fn block(lines: &str) -> String {
    let text = format!("# GRUB Environment Block\n{lines}");
    format!("{text}{}", "#".repeat(1024 - text.len()))
}

fn with_block(block: String) -> Disk {
    Disk { block, ..Disk::default() }
}

/// The lines of the environment block that an entry saves.
fn lines(chosen: &Chosen) -> String {
    let [save] = chosen.saves.as_slice() else { panic!("{:?}", chosen.saves) };
    assert_eq!(save.place, Place { volume: 0, path: "/boot/grub/grubenv".to_owned() });
    let new = String::from_utf8(save.new.clone().unwrap()).unwrap();
    assert_eq!((new.len(), save.old.len()), (1024, 1024));
    new.strip_prefix("# GRUB Environment Block\n").unwrap().trim_end_matches('#').to_owned()
}

#[test]
fn a_saved_entry_is_booted() {
    let disk = with_block(block("saved_entry=More>Debian 6.\\1\n"));
    let chosen = choose_on(&disk, &menu(SAVED)).unwrap();
    assert_eq!((chosen.title.as_str(), chosen.is_once), ("Debian 6.1", false));
    assert!(chosen.saves.is_empty());
    let gone = with_block(block("saved_entry=debian-5.10\n"));
    assert_eq!(choose_on(&gone, &menu(SAVED)).unwrap().title, "Debian");
}

#[test]
fn an_entry_for_the_next_boot_is_booted_and_cleared() {
    let before = "saved_entry=0\nnext_entry=debian-more>debian-6.1\nkept=a\\\\b\n";
    let disk = with_block(block(before));
    let chosen = choose_on(&disk, &menu(SAVED)).unwrap();
    assert_eq!((chosen.title.as_str(), chosen.is_once), ("Debian 6.1", true));
    assert_eq!(lines(&chosen), "saved_entry=0\nnext_entry=\nkept=a\\\\b\n");
    // The caller could not write.
    let second =
        choose(&disk, 0, "/boot/grub/grub.cfg", &menu(SAVED)).unwrap().entries.swap_remove(1);
    assert_eq!((second.title.as_str(), second.is_once), ("Debian", false));
    // What the first boot left.
    let disk = with_block(block(&lines(&choose_on(&disk, &menu(SAVED)).unwrap())));
    let chosen = choose_on(&disk, &menu(SAVED)).unwrap();
    assert_eq!((chosen.title.as_str(), chosen.is_once, chosen.saves.len()), ("Debian", false, 0));
    // As grub-reboot did before version 2.
    let disk = with_block(block("saved_entry=1>1\nprev_saved_entry=0\n"));
    let chosen = choose_on(&disk, &menu(SAVED)).unwrap();
    assert_eq!((chosen.title.as_str(), chosen.is_once), ("Debian 6.1", true));
    assert_eq!(lines(&chosen), "saved_entry=0\nprev_saved_entry=\n");
}

#[test]
fn an_entry_may_save_itself_with_its_submenus() {
    let text = menu(SAVED).replace("\tvideo\n", "\tsavedefault\n\tvideo\n");
    let chosen = choose_on(&with_block(block("saved_entry=More>1\n")), &text).unwrap();
    assert_eq!(chosen.title, "Debian 6.1");
    assert_eq!(lines(&chosen), "saved_entry=debian-more>debian-6.1\n");
    let chosen = choose_on(&with_block(block("")), &text).unwrap();
    assert_eq!(lines(&chosen), "saved_entry=debian-simple\n");
    let unset = "load_env\nunset saved_entry\nsave_env saved_entry none\nmenuentry t { linux /k }";
    let chosen = choose_on(&with_block(block("a=1\nsaved_entry=x\nb=2\n")), unset).unwrap();
    assert_eq!(lines(&chosen), "a=1\nb=2\n");
    let odd = "set v='a\\b'\nsave_env v\nmenuentry a\\>b { save_env chosen\nlinux /k }";
    let chosen = choose_on(&with_block(block("v=1\n")), odd).unwrap();
    assert_eq!(lines(&chosen), "v=a\\\\b\nchosen=a>>b\n");
}

#[test]
fn a_damaged_environment_block_is_not_used_or_not_written() {
    let title = |block: &str| choose_on(&with_block(block.to_owned()), &menu(SAVED)).unwrap();
    // Without the first line it is no environment block.
    assert_eq!(title("saved_entry=1>1\n").title, "Debian");
    assert_eq!(title("").title, "Debian");
    assert_eq!(title("# GRUB Environment Block").title, "Debian");
    // What GRUB reads of a block that was cut is used; but it cannot be written.
    for damaged in [
        "# GRUB Environment Block\nnext_entry=1>1",
        "# GRUB Environment Block\nnext_entry=1>1\nsaved",
        "# GRUB Environment Block\nnext_entry=1>1\n\0\0\0###",
        "# GRUB Environment Block\nnext_entry=1>1\\",
    ] {
        let chosen = title(damaged);
        let written = chosen.saves.iter().all(|save| save.new.is_some());
        let clean = damaged.starts_with("# GRUB Environment Block\nnext_entry=1>1\n");
        assert!(chosen.is_once && (clean || !written), "{damaged:?}: {chosen:?}");
    }
    // No room for a longer value.
    let full = format!("# GRUB Environment Block\na={}\n", "x".repeat(996));
    let text = "load_env\nset a=\"${a}y\"\nsave_env a\nmenuentry t { linux /k }";
    let chosen = choose_on(&with_block(full.clone()), text).unwrap();
    assert_eq!(chosen.saves[0].new, None);
    let same = "load_env\nsave_env a\nmenuentry t { linux /k }";
    let chosen = choose_on(&with_block(full.clone()), same).unwrap();
    assert_eq!(chosen.saves[0].new.as_deref(), Some(full.as_bytes()));
    let error = choose_on(&with_block(block("")), "for i in 1 2; do save_env --file=$i a; done");
    assert_eq!(error.unwrap_err(), GrubError::NoEntries);
    let huge = format!("# GRUB Environment Block\n{}=1\n", "v".repeat(20_000));
    let error = choose_on(&with_block(huge), &menu("")).unwrap_err().to_string();
    assert!(error.contains("16 KiB"), "{error}");
}

#[test]
fn another_file_can_add_entries_and_set_the_default() {
    let custom =
        "set default=mine\nmenuentry Mine --id=mine { linux (hd0,gpt2)/k a=1; initrd /a /b }";
    let disk = Disk { custom: custom.to_owned(), ..Disk::default() };
    let chosen = choose_on(&disk, &menu("")).unwrap();
    assert_eq!((chosen.title.as_str(), chosen.kernel.volume), ("Mine", 1));
    assert_eq!(chosen.initramfs.len(), 2);
    assert!(chosen.initramfs.iter().all(|place| place.volume == 0), "{chosen:?}");
}

#[test]
fn words_are_quoted_expanded_and_split_as_in_a_shell() {
    let text = "set a='x  y'\nset e=\nset q=\"$a \\\"${a}\\\" \\$a\"\n\
                menuentry t { linux /k \"$a\" $a $e '$a' a\\ b \"$q\" c\\\nd \"\" $ }";
    assert_eq!(chosen(text).cmdline, "BOOT_IMAGE=/k x  y x y $a a b x  y \"x  y\" $a cd  $");
}

#[test]
fn the_words_of_a_command_are_bounded_however_short_the_script_is() {
    let with = |a: &str, command: &str| {
        choose_on(&Disk::default(), &format!("set a='{a}'\n{command}\nmenuentry t {{ linux /k }}"))
    };
    let (spaces, long) = ("x ".repeat(8000), "x".repeat(16_000));
    for (a, command, problem) in [
        (&spaces, format!("echo {}", "$a".repeat(200_000)), "more than 4096 words"),
        (&spaces, format!("for i in {}; do true; done", "$a ".repeat(9)), "more than 4096 words"),
        (&long, format!("echo {}", "$a".repeat(200_000)), "a word has more than 16 KiB"),
        (&long, format!("echo {}", "$a ".repeat(5)), "have more than 64 KiB"),
    ] {
        let error = with(a, &command).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
    with(&long, &format!("echo {}", "$a ".repeat(4))).unwrap();
}

#[test]
fn conditions_loops_and_functions_are_run() {
    let condition = |condition: &str| {
        let text = format!(
            "if {condition}; then set r=yes; else set r=no; fi\nmenuentry t {{ linux /k $r }}"
        );
        chosen(&text).cmdline.ends_with("yes")
    };
    for holds in [
        "true",
        "[ a = a ]",
        "[ a == a ]",
        "[ a != b ]",
        "[ ! a = b ]",
        "[ -z '' ]",
        "[ -n a ]",
        "test a",
        "[ 2 -lt 10 ]",
        "[ 2 -ge 2 -a 1 -eq 1 ]",
        "[ a = b -o b = b ]",
        "[ -d /boot ]",
        "[ -e /boot/grub/grubenv ]",
        "[ -f (hd0,gpt1)/boot/grub/custom.cfg ]",
        "[ $grub_platform = pc ]",
        "false; [ $? = 1 ]",
        "search --set=x --label boot",
        "search --file /on-2",
    ] {
        assert!(condition(holds), "{holds}");
    }
    for not in [
        "false",
        "[ a = b ]",
        "[ '' ]",
        "[ -s /boot/grub/grubenv ]",
        "[ -f /boot ]",
        "keystatus --shift",
        "[ -f (hd1)/boot ]",
        "[ a = b -a a = a ]",
        "search --set=x --fs-uuid none",
        "[ ]",
        "no-command",
    ] {
        assert!(!condition(not), "{not}");
    }
    let text = "function f { set r=\"$r$1\"; }\nfor x in a b c; do f $x; done\n\
                while [ \"$r\" != abcdd ]; do f d; done\nuntil [ -n \"$u\" ]; do set u=u; done\n\
                menuentry t { linux /k $r$u }";
    assert!(chosen(text).cmdline.ends_with(" abcddu"), "{}", chosen(text).cmdline);
    let found = chosen("search.fs_label boot root\nmenuentry t { linux /k }");
    assert_eq!(found.kernel.volume, 1);
}

#[test]
fn a_configuration_that_boots_nothing_says_why() {
    assert_eq!(refused("set default=0"), "it has no menu entries");
    assert!(
        refused("menuentry 'Memory test' { linux16_ /m }").contains("`Memory test` has no `linux`")
    );
    assert!(
        refused("menuentry t { linux (hd1,gpt1)/k }").contains("`t` names the device `hd1,gpt1`")
    );
    assert!(refused("submenu s { }").contains("no menu entries"));
    assert!(refused("if true; then").contains("`fi` is missing"));
    assert!(refused("menuentry t {").contains("`}` is missing"));
    assert!(refused("}").contains("did not begin"));
    assert!(refused("set a='").contains("quotation does not end"));
}

#[test]
fn work_and_memory_have_bounds() {
    assert!(refused("while true; do true; done").contains("50000 commands"));
    assert!(refused("while true; do done").contains("50000 commands"));
    assert!(refused("function f { f; }\nf").contains("call each other"));
    assert!(refused(&"if true; then\n".repeat(100)).contains("32 blocks"));
    let doubled = format!("set a=xxxxxxxx\n{}", "set a=\"$a$a\"\n".repeat(40));
    assert!(refused(&doubled).contains("16 KiB"), "{}", refused(&doubled));
    let variables: String = (0..2000).map(|n| format!("set v{n}=1\n")).collect();
    assert!(refused(&variables).contains("1000 variables"));
    assert!(refused(&"menuentry t { true }\n".repeat(1001)).contains("1000 menu entries"));
    let disk = Disk { custom: "source $prefix/custom.cfg".to_owned(), ..Disk::default() };
    let error = choose_on(&disk, "source $prefix/custom.cfg").unwrap_err().to_string();
    assert!(error.contains("call each other"), "{error}");
    let calls = "source $prefix/custom.cfg\n".repeat(100);
    let error = choose_on(&Disk::default(), &calls).unwrap_err().to_string();
    assert!(error.contains("32 other files"), "{error}");
}

#[test]
fn a_command_with_an_exclamation_mark_in_front_succeeds_if_it_fails() {
    for (condition, kernel) in [
        ("! [ -f /x ]", "/yes"),
        ("! [ -f /boot/grub/grubenv ]", "/no"),
        ("! false", "/yes"),
        ("! true", "/no"),
        ("! works", "/no"),
        ("[ ! -f /x ]", "/yes"),
        // GRUB knows one of them, and no `!` alone.
        ("! ! true", "/yes"),
        ("!", "/no"),
    ] {
        let text = format!(
            "function works {{ true }}\nif {condition}; then set k=/yes; else set k=/no; fi\n\
             menuentry a {{ linux $k }}"
        );
        assert_eq!(chosen(&text).kernel.path, kernel, "{condition}");
    }
    let text = "set k=/\nwhile ! [ \"$k\" = /aa ]; do set k=${k}a; done\nmenuentry a { linux $k }";
    assert_eq!(chosen(text).kernel.path, "/aa");
}
